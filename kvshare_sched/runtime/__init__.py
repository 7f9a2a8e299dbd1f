"""One batch, computed: spans of layers over selected rows."""
