"""What happens along training: identities of eigenpairs, drift, stability."""
