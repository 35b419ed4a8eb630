"""Patches in other forms: merged checkpoints, PEFT adapters, repositories on the Hub."""
