"""What the solvers of one layer share: its matrix, the Hessian of its error, and the sweep."""
