"""DataModules: rollouts sampled on policy, and traces from disk."""
