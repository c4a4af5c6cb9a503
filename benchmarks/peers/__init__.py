"""What embring is compared with, each with its best known settings."""
