"""Between host and guest: guest content written safely to the host, host files sent to a guest."""
