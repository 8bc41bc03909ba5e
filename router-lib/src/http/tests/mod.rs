//! Stubs, layers and backhaul over real sockets, with tasks whose assignments the test sets.

mod backhauls;
mod bad_input;
mod kit;
mod layers;
mod stubs;
