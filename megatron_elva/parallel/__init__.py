"""The one package that touches megatron-core's global state: set-up, CPU mode, schedules, collectives."""
