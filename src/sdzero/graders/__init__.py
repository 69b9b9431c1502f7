"""Rewards that can be trusted: programs run in a sandbox, mathematics is compared in processes that can be killed."""
