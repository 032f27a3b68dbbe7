"""What the releases compute beside the methods' equations."""
