"""What the operations are compared with: the step of the released code, row by row, written from its description."""
