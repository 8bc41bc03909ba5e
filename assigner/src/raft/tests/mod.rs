//! Tests of the consensus layer as a whole: the storage by itself, a node alone, three nodes over TCP.

mod kit;
mod storage;
mod golden;
mod power;
mod alone;
mod cluster;
mod members;
mod malformed;
mod contract;
