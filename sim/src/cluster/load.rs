//! The load that tasks report: so much on each part of the key space, shifting now and then, so that there is something to
//! even out.

use mandoline_core::balance::Tuning;
use mandoline_core::key::SliceKey;
use mandoline_core::load::Load;
use mandoline_core::prng::Prng;
use mandoline_core::slice::Slice;

/// Parts of the key space whose load is known.
const PARTS: usize = 32;

/// Fewer slices than a product has: the protocol does not care, and the simulator has less to copy.
pub const TUNING: Tuning =
    Tuning { slices_min: 4, slices_merge: 8, slices_max: 12, ..Tuning::STANDARD };

/// How much load lies on each part of the key space.
#[derive(Clone, Debug)]
pub struct Field([u64; PARTS]);

impl Field {
    /// Draws a load.
    pub fn draw(prng: &mut Prng) -> Self {
        let mut field = Self([0; PARTS]);
        (0..PARTS).for_each(|part| field.0[part] = 200 + prng.below(800));
        field
    }

    /// Shifts some of it: a part becomes hot, or cools down.
    pub fn shift(&mut self, prng: &mut Prng) {
        for _ in 0..4 {
            let part = prng.below(PARTS as u64) as usize;
            self.0[part] = if prng.below(2) == 0 { 100 } else { 500 + prng.below(6_000) };
        }
    }

    /// Gives the load of a slice, in requests a second.
    pub fn of(&self, slice: Slice) -> Load {
        let width = (u64::MAX / PARTS as u64) + 1;
        let (first, last) = (slice.first().0 / width, slice.last().0 / width);
        let part = |part: u64| {
            let whole = Slice::new(SliceKey(part * width), SliceKey(part * width + (width - 1)))
                .expect("a part is not empty");
            let common = whole.overlap(slice).map_or(0, Slice::width);
            u128::from(self.0[part as usize] * 1_000) * common / whole.width()
        };
        Load::from_milli((first..=last).map(part).sum::<u128>() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_carry_what_the_whole_does() {
        let field = Field::draw(&mut Prng::new(1));
        let (low, high) = Slice::FULL.split_at(SliceKey(0x1234_5678_9ABC_DEF0)).unwrap();
        let (whole, parts) = (field.of(Slice::FULL), field.of(low) + field.of(high));
        assert_eq!(whole.milli(), field.0.iter().sum::<u64>() * 1_000);
        assert!(whole.milli() - parts.milli() <= 2);
    }
}
