"""The web page of `dalle serve`."""
