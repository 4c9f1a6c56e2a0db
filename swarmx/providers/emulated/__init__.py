"""An emulated serving engine: real HTTP and real waiting, a modelled device, recorded answer lengths."""
