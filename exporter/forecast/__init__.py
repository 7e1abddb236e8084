"""The saturation forecast: an int8 model and real inputs -> which layers x86 without VNNI clips, and what it does to the outputs."""
