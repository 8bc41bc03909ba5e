//! Decides everything in Mandoline and touches nothing: no clock, socket, thread, lock or randomness of its own.
//!
//! The shells (`assigner`, `router-lib`, `proxy`) and the simulator tell it what happened and when; it says what to do.
//! Modules are listed in order of use: a module uses only what stands above it (`tests/tidy.rs` checks), so the crate
//! can be read from top to bottom.

pub mod time;
pub mod prng;
pub mod name;
pub mod key;
pub mod extract;
pub mod recipe;
pub mod slice;
pub mod slice_map;
pub mod generation;
pub mod task;
pub mod region;
pub mod choice;
pub mod load;
pub mod spec;
pub mod pin;
pub mod sketch;
pub mod report;
pub mod transit;
pub mod assignment;
pub mod brake;
pub mod offers;
pub mod delta;
pub mod spill;
pub mod flags;
pub mod forecast;
pub mod ramp;
pub mod watch;
pub mod lease;
pub mod roster;
pub mod confine;
pub mod plan;
pub mod balance;
pub mod sizes;
pub mod command;
pub mod kept;
pub mod state;
pub mod restart;
mod handoff;
pub mod ward;
pub mod pauses;
pub mod leader;
