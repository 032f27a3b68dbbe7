"""What all methods of a comparison share."""
