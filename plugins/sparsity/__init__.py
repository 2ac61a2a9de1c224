"""The sparsity of a weight: which parts of it are 2:4, and how they are declared beside a checkpoint."""
