//! Stubs, layers and backhaul over real sockets, with tasks whose assignments the test sets.

mod backhauls;
mod bad_input;
mod regions;
mod kit;
mod layers;
mod choices;
mod stubs;
