"""Cache eviction on a transformer that was trained without it.

The policies are in `ham.eviction.policies`, when they act in `ham.eviction.schedule`; the mixer is
`ham.baselines.transformer_evicted`. An arm of a configuration asks for it by `checkpoint_of` and
`eviction`; nothing is trained for it.
"""
