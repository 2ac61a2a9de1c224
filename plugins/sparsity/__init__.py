"""The sparsity of a weight: its pattern, which parts hold it, and how they are declared beside a checkpoint."""
