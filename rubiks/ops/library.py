"""stub"""
def load(): pass
