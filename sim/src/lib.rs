//! Runs Mandoline's decisions on a virtual clock and on real traces.
