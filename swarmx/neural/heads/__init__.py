"""The heads: output length, latency, structure of workflows, images. One module each, with its features."""
