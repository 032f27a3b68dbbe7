"""What a row of a table trains: the library's methods, those of peft, baselines."""
