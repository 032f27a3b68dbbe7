"""The answer: what all records together say to the questions that people ask, and to what papers claim."""
