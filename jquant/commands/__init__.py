"""What each command does, once `jquant.cli` has read its options. Each imports what it needs when it runs."""
