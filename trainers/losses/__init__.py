"""Losses as pure functions of log-probabilities; trainers/objectives/ turns them into objectives."""
