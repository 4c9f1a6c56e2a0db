"""The front door: REST for workflows and operators, the OpenAI API for everything else."""
