"""Image tokenizers: autoencoders that turn images into tokens and back."""
