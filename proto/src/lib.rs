//! The wire and the disk formats of Mandoline, and where bytes become domain types.
