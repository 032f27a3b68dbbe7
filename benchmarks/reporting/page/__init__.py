"""The results page: one folder that opens from disk in a browser, without a network."""
