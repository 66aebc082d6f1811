"""Speed, memory and cost: what a model needs, declared and measured."""
