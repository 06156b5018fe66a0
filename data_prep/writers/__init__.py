"""Writers of prepared pixels: each takes a `Raw` and fills a directory that is not published yet."""
