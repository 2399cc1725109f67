//! Numbers made of several rounds.

use serde::{Deserialize, Serialize};

/// A median with the smallest and the largest of its values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// `None` without values.
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let half = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => sorted[half],
            _ => (sorted[half - 1] + sorted[half]) / 2.0,
        };
        Some(Self { median, min, max })
    }

    /// Of the ratios of rounds that were taken one after the other, so that what disturbs a round counts in both.
    pub(super) fn of_ratios(theirs: &[f64], ours: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = theirs.iter().zip(ours).map(|(a, b)| a / b).collect();
        Self::of(&ratios)
    }

    pub(super) fn map(self, f: impl Fn(f64) -> f64) -> Self {
        Self {
            median: f(self.median),
            min: f(self.min),
            max: f(self.max),
        }
    }
}

/// Rounds that are enough: fewer where one step of PyTorch takes over half a minute.
pub(super) fn rounds(slowest_torch_step: f64) -> usize {
    if slowest_torch_step > 30.0 { 3 } else { 7 }
}

/// `year-month-day` of a number of days since 1970.
pub(super) fn date(days: u64) -> String {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let (mut year, mut day) = (1970, days);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(median: f64, min: f64, max: f64) -> Option<Spread> {
        Some(Spread { median, min, max })
    }

    #[test]
    fn medians_and_spreads() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[3.0]), spread(3.0, 3.0, 3.0));
        assert_eq!(Spread::of(&[9.0, 1.0, 2.0]), spread(2.0, 1.0, 9.0));
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 9.0]), spread(3.0, 1.0, 9.0));
    }

    #[test]
    fn a_ratio_is_the_median_of_the_rounds_ratios() {
        // The third round was disturbed for both; the ratio of medians would be 20 / 2 = 10.
        let (theirs, ours) = ([10.0, 20.0, 60.0], [1.0, 4.0, 2.0]);
        assert_eq!(Spread::of_ratios(&theirs, &ours), spread(10.0, 5.0, 30.0));
        let (theirs, ours) = ([12.0, 20.0, 36.0], [1.0, 4.0, 3.0]);
        assert_eq!(Spread::of_ratios(&theirs, &ours), spread(12.0, 5.0, 12.0));
    }

    #[test]
    fn long_steps_get_fewer_rounds() {
        assert_eq!((rounds(16.5), rounds(30.0), rounds(34.8)), (7, 7, 3));
    }

    #[test]
    fn days_become_dates() {
        for (days, expected) in [
            (0, "1970-01-01"),
            (58, "1970-02-28"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (19_782, "2024-02-29"),
            (19_783, "2024-03-01"),
            (20_453, "2025-12-31"),
            (20_454, "2026-01-01"),
        ] {
            assert_eq!(date(days), expected, "{days}");
        }
    }
}
