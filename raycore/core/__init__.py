"""The engine core: one step loop with its sessions, calls, pause state and beats."""
