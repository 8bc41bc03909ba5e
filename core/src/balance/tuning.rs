//! Every number that someone chose for the balancer, in one place, so that a study can vary them.
//!
//! All of one set, for every workload: none is meant to be tuned for a job. What a job's operator decides is in its spec.
//! Where nothing else is said, the value comes from a study on twelve real traces and synthetic load.

use crate::spec::Ratio;

/// The balancer's constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Slices a task from the start.
    pub slices_min: u32,
    /// Slices a task above which cold neighbours are merged.
    pub slices_merge: u32,
    /// Slices a task up to which hot ones are split.
    pub slices_max: u32,
    /// The share of the load that is taken to lie evenly over all keys, whatever was measured: it spreads slices that are
    /// cold today over all tasks.
    pub reserve: Ratio,
    /// A key that draws more than this share of the mean task load becomes a slice of its own.
    pub isolate_above: Ratio,
    /// How much of the forecast's error widens an adaptive band.
    pub error_widens: Ratio,
    /// How many deviations of error are allowed for beyond what the unluckiest of the tasks has by chance.
    pub error_margin: Ratio,
    /// How much of what was lately unforeseeable widens an adaptive band: no plan can be better than that.
    pub surprise_widens: Ratio,
    /// An adaptive band is no wider than this.
    pub band_max: Ratio,
    /// Where giving stops, on the way from the mean to the band's edge: short of the edge, so that a task that gave does
    /// not stand there again.
    pub give_to: Ratio,
    /// Where giving, and filling on the other side, stops with a fixed band.
    pub fixed_inner: Ratio,
    /// Where taking stops, on the same way: below `give_to`, lest what was given is given on.
    pub take_to: Ratio,
    /// A replica that carries more than this share of the mean is too heavy to balance with.
    pub grow_above: Ratio,
    /// Replicas are added until each carries no more than this.
    pub grow_to: Ratio,
    /// The same for what a slice carries in the long run: small pieces mix well, so that what one key does matters little
    /// to one task. For a key that is hot today and gone tomorrow they are not worth what adding them moves.
    pub split_above: Ratio,
    /// Replicas are added until each carries no more than this in the long run.
    pub split_to: Ratio,
    /// A replica is removed if the rest would then carry no more than this: far below, lest it return.
    pub shrink_below: Ratio,
    /// How dear key space is beside load: at 100 %, a slice of average heat costs twice its load.
    pub space_costs: Ratio,
    /// A slice may carry this share of what its task has too much; one that carries more leaves it too cold.
    pub overshoot: Ratio,
    /// A task below this share of the mean is filled.
    pub fill_below: Ratio,
    /// Up to this share: short of the mean, so that it does not have to give at once.
    pub fill_to: Ratio,
    /// Neighbours are merged if together they carry less than this share of the mean.
    pub merge_below: Ratio,
}

impl Tuning {
    /// What every job runs with.
    pub const STANDARD: Self = Self {
        slices_min: 32,
        slices_merge: 64,
        slices_max: 150,
        reserve: Ratio::percent(1),
        isolate_above: Ratio::percent(2),
        error_widens: Ratio::percent(130),
        error_margin: Ratio::percent(130),
        surprise_widens: Ratio::percent(50),
        band_max: Ratio::percent(100),
        give_to: Ratio::percent(80),
        fixed_inner: Ratio::percent(45),
        take_to: Ratio::percent(30),
        grow_above: Ratio::percent(35),
        grow_to: Ratio::percent(30),
        split_above: Ratio::percent(10),
        split_to: Ratio::percent(8),
        shrink_below: Ratio::percent(4),
        space_costs: Ratio::percent(100),
        overshoot: Ratio::percent(110),
        fill_below: Ratio::percent(50),
        fill_to: Ratio::percent(95),
        merge_below: Ratio::percent(4),
    };
}
