"""What ``mezo`` does before and after a run: try a reward, predict, replay and export."""
