//! A typed filter expression and its evaluation in SQL's three-valued logic.

use std::cmp::Ordering;

use super::like::Pattern;
use super::value::{Constant, Reading, Value};
use crate::model::{Cell, Code, Fault, Result};

/// A comparison operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operator {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
}

impl Operator {
    fn holds(self, order: Ordering) -> bool {
        match self {
            Operator::Equal => order.is_eq(),
            Operator::NotEqual => order.is_ne(),
            Operator::Less => order.is_lt(),
            Operator::LessEqual => order.is_le(),
            Operator::Greater => order.is_gt(),
            Operator::GreaterEqual => order.is_ge(),
        }
    }

    /// As SQL writes it.
    pub(super) fn sql(self) -> &'static str {
        match self {
            Operator::Equal => "=",
            Operator::NotEqual => "<>",
            Operator::Less => "<",
            Operator::LessEqual => "<=",
            Operator::Greater => ">",
            Operator::GreaterEqual => ">=",
        }
    }

    /// True for the four operators that need an order.
    pub(super) fn orders(self) -> bool {
        !matches!(self, Operator::Equal | Operator::NotEqual)
    }
}

/// One side of a comparison. `C` names a column: by name while the filter is only known, by position once it is bound.
#[derive(Debug, Clone)]
pub(super) enum Operand<C> {
    Column(C, Reading),
    /// The constant, and how SQL writes it.
    Constant(Constant, String),
}

/// A boolean expression.
#[derive(Debug, Clone)]
pub(super) enum Node<C> {
    /// TRUE, FALSE or NULL.
    Known(Option<bool>),
    /// A boolean column.
    Flag(C),
    Compare {
        left: Operand<C>,
        operator: Operator,
        right: Operand<C>,
    },
    /// IS DISTINCT FROM.
    Distinct {
        left: Operand<C>,
        right: Operand<C>,
    },
    /// A column among constants, which are sorted; `null` when NULL is among them.
    In {
        column: C,
        reading: Reading,
        list: Vec<(Constant, String)>,
        null: bool,
    },
    Like {
        column: C,
        pattern: Pattern,
    },
    /// A column IS NULL.
    IsNull(C),
    /// A boolean expression IS UNKNOWN.
    Unknown(Box<Node<C>>),
    /// A boolean expression IS TRUE or IS FALSE.
    Is(Box<Node<C>>, bool),
    Not(Box<Node<C>>),
    And(Vec<Node<C>>),
    Or(Vec<Node<C>>),
}

impl<C> Node<C> {
    /// The same expression with another notion of a column.
    pub(super) fn map<D>(&self, f: &mut impl FnMut(&C) -> Result<D>) -> Result<Node<D>> {
        let operand = |operand: &Operand<C>, f: &mut dyn FnMut(&C) -> Result<D>| {
            Ok(match operand {
                Operand::Column(column, reading) => Operand::Column(f(column)?, reading.clone()),
                Operand::Constant(constant, sql) => Operand::Constant(constant.clone(), sql.clone()),
            })
        };
        Ok(match self {
            Node::Known(known) => Node::Known(*known),
            Node::Flag(column) => Node::Flag(f(column)?),
            Node::Compare { left, operator, right } => {
                Node::Compare { left: operand(left, f)?, operator: *operator, right: operand(right, f)? }
            }
            Node::Distinct { left, right } => Node::Distinct { left: operand(left, f)?, right: operand(right, f)? },
            Node::In { column, reading, list, null } => {
                Node::In { column: f(column)?, reading: reading.clone(), list: list.clone(), null: *null }
            }
            Node::Like { column, pattern } => Node::Like { column: f(column)?, pattern: pattern.clone() },
            Node::IsNull(column) => Node::IsNull(f(column)?),
            Node::Unknown(inner) => Node::Unknown(Box::new(inner.map(f)?)),
            Node::Is(inner, truth) => Node::Is(Box::new(inner.map(f)?), *truth),
            Node::Not(inner) => Node::Not(Box::new(inner.map(f)?)),
            Node::And(parts) => Node::And(parts.iter().map(|part| part.map(f)).collect::<Result<_>>()?),
            Node::Or(parts) => Node::Or(parts.iter().map(|part| part.map(f)).collect::<Result<_>>()?),
        })
    }
}

/// What an expression may come to, as a set: a value that was not sent leaves more than one outcome open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outcomes(u8);

impl Outcomes {
    pub(super) const TRUE: Outcomes = Outcomes(1);
    const FALSE: Outcomes = Outcomes(2);
    const NULL: Outcomes = Outcomes(4);
    /// An unchanged TOAST value is never NULL, so a comparison with it is true or false.
    const OPEN: Outcomes = Outcomes(3);

    fn of(truth: bool) -> Outcomes {
        if truth { Outcomes::TRUE } else { Outcomes::FALSE }
    }

    /// True when one of `others` is possible.
    pub(super) fn may_be(self, others: Outcomes) -> bool {
        self.0 & others.0 != 0
    }

    fn or_also(self, others: Outcomes) -> Outcomes {
        Outcomes(self.0 | others.0)
    }

    fn when(self, possible: bool) -> Outcomes {
        if possible { self } else { Outcomes(0) }
    }

    fn not(self) -> Outcomes {
        Outcomes((self.0 & 4) | (self.0 & 1) << 1 | (self.0 & 2) >> 1)
    }

    fn and(self, other: Outcomes) -> Outcomes {
        let not_false = Outcomes(5);
        let null = self.may_be(Outcomes::NULL) && other.may_be(not_false)
            || other.may_be(Outcomes::NULL) && self.may_be(not_false);
        Outcomes::TRUE
            .when(self.may_be(Outcomes::TRUE) && other.may_be(Outcomes::TRUE))
            .or_also(Outcomes::FALSE.when(self.may_be(Outcomes::FALSE) || other.may_be(Outcomes::FALSE)))
            .or_also(Outcomes::NULL.when(null))
    }
}

/// Where a bound column's value is, and its name for messages.
#[derive(Debug, Clone)]
pub(super) struct Position {
    pub(super) index: usize,
    pub(super) name: String,
}

/// The state of an operand in one row.
enum Side<'a> {
    Null,
    Unchanged,
    Value(Value<'a>),
}

impl Node<Position> {
    /// What the expression comes to for one row.
    pub(super) fn outcomes(&self, row: &[Cell<'_>]) -> Result<Outcomes> {
        Ok(match self {
            Node::Known(Some(truth)) => Outcomes::of(*truth),
            Node::Known(None) => Outcomes::NULL,
            Node::Flag(column) => {
                compare(&side(column, &Reading::Bool, row)?, &Side::Value(Value::Integer(1)), Operator::Equal)?
            }
            Node::Compare { left, operator, right } => compare(&left.side(row)?, &right.side(row)?, *operator)?,
            Node::Distinct { left, right } => distinct(&left.side(row)?, &right.side(row)?)?,
            Node::In { column, reading, list, null } => is_among(&side(column, reading, row)?, list, *null)?,
            Node::Like { column, pattern } => match cell(column, row)? {
                Cell::Null => Outcomes::NULL,
                Cell::Unchanged => Outcomes::OPEN,
                Cell::Text(text) => Outcomes::of(pattern.matches(text)),
            },
            Node::IsNull(column) => Outcomes::of(matches!(cell(column, row)?, Cell::Null)),
            Node::Unknown(inner) => {
                let inner = inner.outcomes(row)?;
                let yes = Outcomes::TRUE.when(inner.may_be(Outcomes::NULL));
                yes.or_also(Outcomes::FALSE.when(inner.may_be(Outcomes::OPEN)))
            }
            Node::Is(inner, truth) => {
                let (inner, wanted) = (inner.outcomes(row)?, Outcomes::of(*truth));
                let others = Outcomes(7 & !wanted.0);
                Outcomes::TRUE.when(inner.may_be(wanted)).or_also(Outcomes::FALSE.when(inner.may_be(others)))
            }
            Node::Not(inner) => inner.outcomes(row)?.not(),
            Node::And(parts) => fold(parts, row, false)?,
            Node::Or(parts) => fold(parts, row, true)?,
        })
    }
}

/// AND, or OR as the negation of AND over negations; ends at the first part that decides alone.
fn fold(parts: &[Node<Position>], row: &[Cell<'_>], is_or: bool) -> Result<Outcomes> {
    let flip = |outcomes: Outcomes| if is_or { outcomes.not() } else { outcomes };
    let mut all = Outcomes::TRUE;
    for part in parts {
        all = all.and(flip(part.outcomes(row)?));
        if all == Outcomes::FALSE {
            break;
        }
    }
    Ok(flip(all))
}

impl Operand<Position> {
    fn side<'a>(&'a self, row: &[Cell<'a>]) -> Result<Side<'a>> {
        match self {
            Operand::Column(column, reading) => side(column, reading, row),
            Operand::Constant(constant, _) => Ok(Side::Value(constant.value())),
        }
    }
}

fn cell<'a>(column: &Position, row: &[Cell<'a>]) -> Result<Cell<'a>> {
    row.get(column.index).copied().ok_or_else(|| {
        let what = format!("row filter: a row of {} columns has no column \"{}\"", row.len(), column.name);
        Fault::new(Code::ShapeMismatch, what).remedy("start `sitepair run` again so that it reads the catalog anew")
    })
}

fn side<'a>(column: &Position, reading: &Reading, row: &[Cell<'a>]) -> Result<Side<'a>> {
    match cell(column, row)? {
        Cell::Null => Ok(Side::Null),
        Cell::Unchanged => Ok(Side::Unchanged),
        Cell::Text(text) => reading.read(text).map(Side::Value).ok_or_else(|| {
            let what = format!(
                "row filter: a value of column \"{}\" is not of the type (or not among the enum's labels) that the column had at start",
                column.name
            );
            Fault::new(Code::ShapeMismatch, what).remedy("start `sitepair run` again so that it reads the catalog anew")
        }),
    }
}

/// The order of two values of one comparison.
fn order(left: Value<'_>, right: Value<'_>) -> Result<Ordering> {
    left.compare(right)
        .ok_or_else(|| Fault::new(Code::BadFilter, "row filter: two sides of a comparison are read differently"))
}

fn compare(left: &Side<'_>, right: &Side<'_>, operator: Operator) -> Result<Outcomes> {
    Ok(match (left, right) {
        (Side::Null, _) | (_, Side::Null) => Outcomes::NULL,
        (Side::Unchanged, _) | (_, Side::Unchanged) => Outcomes::OPEN,
        (Side::Value(left), Side::Value(right)) => Outcomes::of(operator.holds(order(*left, *right)?)),
    })
}

fn distinct(left: &Side<'_>, right: &Side<'_>) -> Result<Outcomes> {
    Ok(match (left, right) {
        (Side::Null, Side::Null) => Outcomes::FALSE,
        (Side::Null, _) | (_, Side::Null) => Outcomes::TRUE,
        (Side::Unchanged, _) | (_, Side::Unchanged) => Outcomes::OPEN,
        (Side::Value(left), Side::Value(right)) => Outcomes::of(order(*left, *right)?.is_ne()),
    })
}

fn is_among(side: &Side<'_>, list: &[(Constant, String)], null: bool) -> Result<Outcomes> {
    let otherwise = if null { Outcomes::NULL } else { Outcomes::FALSE };
    Ok(match side {
        Side::Null => Outcomes::NULL,
        Side::Unchanged => Outcomes::TRUE.or_also(otherwise),
        Side::Value(value) => {
            for (constant, _) in list {
                if order(*value, constant.value())?.is_eq() {
                    return Ok(Outcomes::TRUE);
                }
            }
            otherwise
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_valued_logic_holds_for_every_pair_of_sets() {
        let single = [Some(true), Some(false), None];
        let bit = |truth: Option<bool>| match truth {
            Some(truth) => Outcomes::of(truth),
            None => Outcomes::NULL,
        };
        let and = |a: Option<bool>, b: Option<bool>| match (a, b) {
            (Some(false), _) | (_, Some(false)) => Some(false),
            (Some(true), Some(true)) => Some(true),
            _ => None,
        };
        for left in 1..8 {
            assert_eq!(Outcomes(left).not().not(), Outcomes(left));
            for right in 1..8 {
                let mut expected = Outcomes(0);
                for a in single.into_iter().filter(|a| Outcomes(left).may_be(bit(*a))) {
                    for b in single.into_iter().filter(|b| Outcomes(right).may_be(bit(*b))) {
                        expected = expected.or_also(bit(and(a, b)));
                    }
                }
                assert_eq!(Outcomes(left).and(Outcomes(right)), expected, "{left} {right}");
            }
        }
    }
}
