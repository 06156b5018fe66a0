"""From prepared bytes to the rows and views of a step."""
