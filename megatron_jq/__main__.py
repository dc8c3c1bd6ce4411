"""`python -m megatron_jq`: the same command line as `megatron-jq`, for torchrun and srun, which start modules."""

from megatron_jq.cli.main import program

if __name__ == "__main__":  # saving a checkpoint spawns a helper process, which imports this module again
    program()
