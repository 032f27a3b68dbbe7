"""One method, one file. Each file's head names the paper and the release and lists where the two differ."""
