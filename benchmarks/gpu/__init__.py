"""What a machine with a GPU is to do, in calls of some minutes each."""
