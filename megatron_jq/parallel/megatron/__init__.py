"""F2: the one room for what depends on Megatron-core's version, or on having no CUDA.

versions.py has what differs between Megatron-core 0.16 and 0.19; cpu.py what Megatron-core asks of CUDA.
"""
