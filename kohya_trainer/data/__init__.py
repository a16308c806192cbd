"""Examples on disk: pictures and sounds with their captions. It knows no models; training_data.py makes batches."""
