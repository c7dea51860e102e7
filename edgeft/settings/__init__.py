"""What can a user ask for, and what differs between ways of tuning?"""
