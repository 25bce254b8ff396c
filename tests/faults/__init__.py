"""What a run survives: killed, starved of disk and memory, damaged, attacked; each fault beside the stock Trainer's."""
