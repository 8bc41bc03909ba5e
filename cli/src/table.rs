//! Aligned columns for people: text to the left, numbers to the right, no lines drawn, so that `awk` can read them too.

use std::fmt;

/// Rows under a heading.
#[derive(Debug)]
pub(crate) struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Begins a table.
    pub(crate) fn new(heading: &[&'static str]) -> Self {
        Self { heading: heading.to_vec(), rows: vec![] }
    }

    /// Adds a row; an empty cell is shown as a dash, so that columns can be counted.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let dash = |cell: String| if cell.is_empty() { "-".to_owned() } else { cell };
        let row: Vec<String> = cells.into_iter().map(dash).collect();
        debug_assert_eq!(row.len(), self.heading.len(), "a cell for every column");
        self.rows.push(row);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            cells.chain([self.heading[column].len()]).max().unwrap_or_default()
        };
        let numeric = |column: usize| {
            let is_number =
                |row: &Vec<String>| row[column] == "-" || row[column].parse::<f64>().is_ok();
            !self.rows.is_empty() && self.rows.iter().all(is_number)
        };
        let columns: Vec<(usize, bool)> =
            (0..self.heading.len()).map(|column| (width(column), numeric(column))).collect();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::new();
            for (cell, (width, right)) in cells.zip(&columns) {
                if !text.is_empty() {
                    text.push_str("  ");
                }
                let padded =
                    if *right { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
                text.push_str(&padded);
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(&mut self.heading.iter().copied())?;
        for row in &self.rows {
            line(&mut row.iter().map(String::as_str))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_numbers_stand_right() {
        let mut table = Table::new(&["NAME", "SLICES", "NOTE"]);
        table.row(["a".into(), "7".into(), "x".into()]);
        table.row(["longer".into(), "1234567".into(), String::new()]);
        let expected = "NAME     SLICES  NOTE\na             7  x\nlonger  1234567  -\n";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn a_table_without_rows_is_its_heading() {
        assert_eq!(Table::new(&["A", "B"]).to_string(), "A  B\n");
    }
}
