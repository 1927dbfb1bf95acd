"""The autoencoders that turn pictures into tokens and back."""
