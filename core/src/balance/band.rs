//! How wide the band is: by the operator's word, or by how well loads can be foreseen.
//!
//! An adaptive band is as narrow as its floor where loads stand still. It widens by what estimates are off by chance, for as
//! many tasks as there are, so that counting noise moves nothing; and by a part of what nobody foresaw lately, since tasks
//! that far above the mean will be seen whatever the plan is.

use crate::balance::meter::{Marks, scale};
use crate::balance::round::Round;
use crate::balance::tuning::Tuning;
use crate::load::Load;
use crate::spec::{Band, BandOf, Ratio};

/// Sets the pressures between which tasks are kept.
pub(in crate::balance) fn marks(
    round: &Round,
    tuning: &Tuning,
    serving: usize,
    free: bool,
    mean: u64,
) -> Marks {
    if free {
        return Marks::above(mean, EVEN.of(mean), tuning.give_to, tuning.take_to);
    }
    let (width, fixed) = match round.policy.band {
        Band::Adaptive(floor) => {
            // Of n tasks the unluckiest is sqrt(2 ln n) deviations off; a little more, lest it moves each time.
            let unluckiest = (2 * 693 * 1_000 * u64::from(serving.max(2).ilog2())).isqrt();
            let deviations = unluckiest + u64::from(tuning.error_margin.millionths() / 1_000);
            let error = u64::from(round.forecast_error.millionths());
            let error = tuning.error_widens.of(scale(error, deviations, 1_000));
            let lag = tuning.surprise_widens.of(u64::from(round.surprise.millionths()));
            let wide = u64::from(floor.millionths()) + error + lag;
            let most = u64::from(tuning.band_max.max(floor).millionths());
            (scale(mean, wide.min(most), 1_000_000), false)
        }
        Band::Fixed { ratio, of: BandOf::Mean } => (ratio.of(mean), true),
        Band::Fixed { ratio, of: BandOf::Hint } => {
            let hint = round.policy.max_load_hint.map_or(mean, Load::milli);
            (ratio.of(hint.max(mean)), true)
        }
    };
    let mut marks = Marks::above(mean, width, tuning.give_to, tuning.take_to);
    if fixed {
        // Who asks for a width means it for both sides, and for what holds until the next round.
        let inner = tuning.fixed_inner;
        marks = Marks::above(mean, width, inner, tuning.take_to);
        marks.floor = mean.saturating_sub(width);
        marks.fill_to = mean.saturating_sub(inner.of(width));
    } else {
        marks.floor = tuning.fill_below.of(mean).saturating_sub(2 * width);
        marks.fill_to = tuning.fill_to.of(mean);
    }
    marks
}

/// The band where nothing was measured: a task begins with 32 slices, so one more or less is three percent.
const EVEN: Ratio = Ratio::percent(3);
