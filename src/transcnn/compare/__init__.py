"""Networks side by side in parameters, multiply-adds, speed and memory."""
