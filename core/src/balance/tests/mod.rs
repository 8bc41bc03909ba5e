//! What plans say: transcripts of small rounds, and random jobs for what holds of all of them.

mod transcript;
mod even;
mod hot;
mod word;
mod chance;
