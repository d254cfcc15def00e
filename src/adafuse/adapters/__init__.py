"""What a method adds to a backbone: routers, experts, the layers that carry them, the oracle and the files."""
