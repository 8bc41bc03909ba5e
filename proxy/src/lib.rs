//! The L7 proxy of Mandoline: sends each request to the task that owns its key.
